"""Text to ids and back for one checkpoint: the turns of its chat template, built from ids.

Control tokens (`<|im_start|>`, `<|im_end|>`, ...) are inserted by id. Text goes through a copy of the tokenizer that
has none, so nothing in a persona, question, answer or critique can become one. For ordinary text the ids equal those of
the checkpoint's own chat template; one that is neither ChatML nor Llama 3's is refused. Models that can reason first
(Qwen3) are told not to: see `Chat`. For a model behind a server, which gets text, `without_control_tokens` breaks them.
"""

import json
import os
import re
from dataclasses import dataclass

from jinja2 import TemplateError
from tokenizers import Tokenizer

from json_files import read_json
from weights import resolve, stop_ids

# What models of other makers read as control tokens in a message's text, whoever wrote it. Everything of the forms
# <|...|>, <|...>, <...|> (ChatML, Llama 3 and 4, Phi, GLM, Command R, gpt-oss, Granite, Kimi, Gemma), the same with the
# wide bar U+FF5C (DeepSeek) and [|...|] (EXAONE) is one, and broken by its beginning; these are the others.
CONTROL_TOKENS = {
    "Llama 2, Mistral": "<s> </s> <unk> [INST] [/INST] <<SYS>> <</SYS>>",
    "Mistral": "[SYSTEM_PROMPT] [/SYSTEM_PROMPT] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_CALLS] [TOOL_CONTENT] "
    "[ARGS] [TOOL_RESULTS] [/TOOL_RESULTS] [CALL_ID] [THINK] [/THINK] [IMG] [IMG_BREAK] [IMG_END] [AUDIO] "
    "[BEGIN_AUDIO] [MODEL_SETTINGS] [/MODEL_SETTINGS] [PREFIX] [MIDDLE] [SUFFIX]",
    "Gemma": "<bos> <eos> <pad> <mask> <start_of_turn> <end_of_turn> <start_of_image> <end_of_image> "
    "<start_function_call> <end_function_call>",
    "Qwen, DeepSeek, GLM": "<think> </think> <tool_call> </tool_call> <tool_response> </tool_response> <arg_key> "
    "</arg_key> <arg_value> </arg_value> [gMASK] [sMASK] [MASK] <sop> <eop>",
    "Command R": "<BOS_TOKEN> <EOS_TOKEN> <PAD> <UNK> <CLS> <SEP> <MASK_TOKEN> <EOP_TOKEN>",
    "Kimi, BERT": "[BOS] [EOS] [EOT] [PAD] [UNK] [CLS] [SEP]",
    "InternLM": "<eoh> <eoa> <eosys> [UNUSED_TOKEN_145] [UNUSED_TOKEN_146]",
    "MiniMax": "]~b] ]~!b[ [e~[",
    "Seed": "<seed:bos> <seed:eos> <seed:think> </seed:think> <seed:tool_call> </seed:tool_call>",
    "models that see and hear": "<image> <img> </img> <video> <audio> <box> </box> <ref> </ref>",
}
CONTROL_TOKEN = re.compile(
    "|".join(
        [
            r"<(?=[|\uff5c]|\w+\|>)",
            r"\[(?=\|)",
            *(re.escape(t) for texts in CONTROL_TOKENS.values() for t in texts.split()),
        ]
    )
)


def without_control_tokens(value):
    """Text out of rows, alone or in lists and objects, for a model behind a server: a space behind the first character
    of what may be a control token breaks it, and leaves it readable. (A model in this process gets ids: see `Chat`.)
    """
    if isinstance(value, str):
        return CONTROL_TOKEN.sub(lambda match: f"{match[0][0]} {match[0][1:]}", value)
    if isinstance(value, dict):
        return {without_control_tokens(k): without_control_tokens(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(without_control_tokens, value))
    return value


@dataclass(frozen=True)
class Form:
    """How a chat template writes a turn: `start` role `role_end` `gap` content `end` `after_turn`.

    start, role_end (if any), end: control tokens; the others are text. strips: white space around a content is cut off.
    """

    name: str
    start: str
    role_end: str
    gap: str
    end: str
    after_turn: str
    strips: bool


FORMS = (
    Form("ChatML", "<|im_start|>", "", "\n", "<|im_end|>", "\n", strips=False),
    Form("Llama 3", "<|start_header_id|>", "<|end_header_id|>", "\n\n", "<|eot_id|>", "", strips=True),
)


class Chat:
    """Text to ids and back for one checkpoint: a folder or hub id with tokenizer.json.

    turn_start, turn_end: control ids. stop_ids: ids that end a response, turn_end first. system: the system message
    that the checkpoint's chat template inserts where none is given, or None.
    header: what a response follows on. Where the template has `enable_thinking` (Qwen3), the header is that of false,
    with the empty <think> block: it is part of the prompt, so that no response holds one, to be trained or judged. In
    an edit prompt the block stays in the earlier turn, unlike in the template, since prompts have to be continued.
    ValueError: no tokenizer, neither ChatML's nor Llama 3's tokens, a chat template of another form.
    """

    def __init__(self, path: str):
        from transformers import AutoTokenizer

        folder = resolve(path)
        if not os.path.isfile(os.path.join(folder, "tokenizer.json")):
            raise ValueError(f"{path}: no tokenizer.json; expected a checkpoint with its tokenizer")
        for name in ("tokenizer.json", "tokenizer_config.json"):
            if os.path.isfile(os.path.join(folder, name)):
                read_json(os.path.join(folder, name))  # or the error below would not say which of them is broken
        # Through transformers, for the ids that it and vLLM give: for Qwen2 it sets the splitting
        # of text into words itself, whatever tokenizer.json says.
        try:
            reference = AutoTokenizer.from_pretrained(folder)
        except Exception as error:  # tokenizers has no errors of its own kind
            file = os.path.join(folder, "tokenizer.json")
            raise ValueError(f"{file}: not a tokenizer ({type(error).__name__}: {error})") from error
        raw = json.loads(reference.backend_tokenizer.to_str())
        self.control = {token["content"]: token["id"] for token in raw["added_tokens"]}
        self.form = next(
            (form for form in FORMS if {form.start, form.role_end, form.end} - {""} <= set(self.control)), None
        )
        if self.form is None:
            expected = " nor ".join(f"{form.start} and {form.end} ({form.name})" for form in FORMS)
            raise ValueError(f"{path}: the tokenizer has neither {expected}")
        self.tokenizer = Tokenizer.from_str(json.dumps(raw))
        self.plain = _plain_tokenizer(raw, self.control, path)
        self.text_ids = set(self.plain.get_vocab().values())
        self.turn_start, self.turn_end = self.control[self.form.start], self.control[self.form.end]
        self.after_turn = self.encode(self.form.after_turn)
        self.stop_ids = stop_ids(folder, self.control)
        found = _read_template(reference, self.form, path)
        self.system = found.system
        self._before, self._preamble = self._control_ids(found.before), found.preamble
        self.header = [*self._role("assistant", ""), *self._control_ids(found.unthinking)]

    def encode(self, text: str) -> list[int]:
        """Ids of text; no text gives a control id."""
        return self.plain.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        """Text of ids, control tokens as text; the tail of a padded vocabulary has none."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=False)

    def turn(self, role: str, content: str, before: str = "") -> list[int]:
        """before: text of the template's own in front of the content."""
        content = content.strip() if self.form.strips else content
        return [*self._role(role, before + content), self.turn_end, *self.after_turn]

    def messages(self, messages: list[dict]) -> list[int]:
        """Ids of [{"role", "content"}, ...] and the assistant's header.

        The default system message comes first where the first message is no system message.
        ValueError: nothing to answer, an unknown role, a content that is not text.
        """
        if not messages:
            raise ValueError(
                "messages[0]: expected a message of the user (or the system's) before the assistant's first; "
                "what comes before it is an empty list"
            )
        for n, message in enumerate(messages):
            if not isinstance(message, dict):
                raise ValueError(f"messages[{n}]: expected an object with role and content, got {message!r}")
            role, content = message.get("role"), message.get("content")
            if role not in ("system", "user", "assistant") or not isinstance(content, str):
                raise ValueError(
                    f"messages[{n}]: expected a role (system, user, assistant) and a "
                    f"text as content; got {role!r} and {type(content).__name__}"
                )
        ids = list(self._before)
        if messages[0]["role"] == "system":
            ids += self.turn("system", messages[0]["content"], before=self._preamble)
            messages = messages[1:]
        elif self.system is not None:
            ids += self.turn("system", "", before=self.system)
        return ids + [i for m in messages for i in self.turn(m["role"], m["content"])] + self.header

    def _role(self, role: str, content: str) -> list[int]:
        """A turn up to its content's end. What is text between two control tokens is encoded as one, as in the
        template: a leading line break of the content may merge with the form's."""
        if not self.form.role_end:
            return [self.turn_start, *self.encode(role + self.form.gap + content)]
        role_end = self.control[self.form.role_end]
        return [self.turn_start, *self.encode(role), role_end, *self.encode(self.form.gap + content)]

    def _control_ids(self, text: str) -> list[int]:
        """Ids of a template's own text, in which control tokens are what they look like."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids


def _plain_tokenizer(raw, control, path):
    """A tokenizer in which added tokens cannot match, nor as words of its vocabulary."""
    vocab = {token: i for token, i in raw["model"]["vocab"].items() if token not in control}
    model = {**raw["model"], "vocab": vocab}
    changes = {"added_tokens": [], "post_processor": None, "model": model}
    plain = Tokenizer.from_str(json.dumps({**raw, **changes}))
    for token in control:
        if set(plain.encode(f"a{token} {token}").ids) & set(control.values()):
            raise ValueError(f"{path}: the tokenizer makes a control token of the text {token!r}")
    return plain


@dataclass(frozen=True)
class Template:
    """What a checkpoint's chat template adds to a talk."""

    before: str  # the first turn: a token that begins every text, or nothing
    system: str | None  # the system message where none is given
    preamble: str  # what a given system message is preceded by, in its turn
    unthinking: str  # behind the header of a response that shall not reason first, or nothing


# What Llama 3's template names as today where no clock is at hand, so that prompts do not change at midnight
LLAMA_DATE = "26 Jul 2024"


def _read_template(reference, form: Form, path: str) -> Template:
    """Reads the checkpoint's chat template by what it makes of talks. ValueError: it is not of the form."""
    if reference.chat_template is None:
        return Template("", None, "", "")

    def render(turns, **settings):
        talk = [{"role": role, "content": content} for role, content in turns]
        settings = dict(tokenize=False, add_generation_prompt=True, date_string=LLAMA_DATE) | settings
        try:
            return reference.apply_chat_template(talk, **settings)
        except TemplateError as error:
            raise ValueError(f"{path}: its chat template fails on a plain talk: {error}") from error

    def opened(role):
        return f"{form.start}{role}{form.role_end}{form.gap}"

    def expected(turns):
        return (
            before + "".join(f"{opened(r)}{text}{form.end}{form.after_turn}" for r, text in turns) + opened("assistant")
        )

    talk = [("user", "Q1"), ("assistant", "A1"), ("user", "Q2")]
    text, own = render(talk), render([("system", "S"), *talk])
    before = text[: max(0, text.find(form.start))]
    system_turn = re.compile(re.escape(before + opened("system")) + "(.*?)" + re.escape(form.end), re.DOTALL)
    inserted, given = system_turn.match(text), system_turn.match(own)
    preamble = given[1].removesuffix("S") if given else ""
    turns = [("system", inserted[1])] if inserted else []
    if text != expected([*turns, *talk]) or own != expected([("system", f"{preamble}S"), *talk]):
        raise ValueError(f"{path}: its chat template is not plain {form.name}; a talk gives {text!r}")
    unthinking = render(talk, enable_thinking=False)
    if not unthinking.startswith(text):
        raise ValueError(
            f"{path}: with enable_thinking=False its chat template is not plain {form.name}: {unthinking!r}"
        )
    return Template(before, inserted[1] if inserted else None, preamble, unthinking[len(text) :])
