"""Text to ids and back for one checkpoint, with the turns of its chat template built from ids.

Control tokens (`<|im_start|>`, `<|im_end|>`, ...) are inserted by id. Text is encoded by a copy of the tokenizer
without them, so that nothing in a persona, question, answer or critique can become a control token. For ordinary text
the ids equal those of the checkpoint's own chat template. Templates other than ChatML and Llama 3's are refused. Models
that can reason first (Qwen3) are told not to; see `Chat`.

A model behind a server gets text, not ids. `without_control_tokens` breaks control tokens for it.
"""

import json
import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError
from tokenizers import Tokenizer

from json_files import read_json
from weights import TEMPLATE_DEFAULTS, resolve, stop_ids

if TYPE_CHECKING:  # slow to import
    from transformers import PreTrainedTokenizerBase

# Texts that models of other makers read as control tokens, whoever wrote them. All texts of the forms <|...|>, <|...>
# and <...|> count (ChatML, Llama 3 and 4, Phi, GLM, Command R, gpt-oss, Granite, Kimi, Gemma), also with the wide bar
# U+FF5C (DeepSeek), and [|...|] (EXAONE): they are broken after their first character. The rest is listed here.
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
_LISTED = [re.escape(token) for tokens in CONTROL_TOKENS.values() for token in tokens.split()]
CONTROL_TOKEN = re.compile("|".join([r"<(?=[|\uff5c]|\w+\|>)", r"\[(?=\|)", *_LISTED]))


def without_control_tokens(value: Any) -> Any:
    """Breaks control tokens in a text, or in all texts of a list or object, for a model behind a server.

    A space after the first character breaks a control token and leaves it readable. A model in this process doesn't
    need it, since it gets ids (`Chat`).
    """
    if isinstance(value, str):
        return CONTROL_TOKEN.sub(lambda match: f"{match[0][0]} {match[0][1:]}", value)
    if isinstance(value, dict):
        return {without_control_tokens(key): without_control_tokens(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(without_control_tokens, value))
    return value


@dataclass(frozen=True)
class TurnFormat:
    """How a chat template writes a turn: start, role, role_end, gap, content, end, after_turn.

    start, role_end (if any) and end are control tokens. The others are text.
    """

    name: str
    start: str
    role_end: str
    gap: str
    end: str
    after_turn: str
    strips: bool  # white space around the content is removed


TURN_FORMATS = (
    TurnFormat("ChatML", "<|im_start|>", "", "\n", "<|im_end|>", "\n", strips=False),
    TurnFormat("Llama 3", "<|start_header_id|>", "<|end_header_id|>", "\n\n", "<|eot_id|>", "", strips=True),
)


TALK = [{"role": role, "content": text} for role, text in (("user", "Q"), ("assistant", "A"), ("user", "Q2"))]


class Chat:
    """Text to ids and back for one checkpoint: a folder or hub id with tokenizer.json.

    control: {text: id} of control tokens.
    turn_start, turn_end: control ids around a turn.
    stop_ids: ids that end a response, turn_end first.
    system: the system message that the chat template inserts where none is given, or None.
    header: ids that a response follows, the assistant's header.

    Where the template has `enable_thinking` (Qwen3), the header is the one for false, with its empty <think> block. The
    block is part of the prompt, so that no response holds one that would be trained or judged. In an edit prompt it
    stays in the earlier turn, unlike in the template, because prompts have to be continued.

    Raises ValueError without a tokenizer or a chat template, for a tokenizer with neither ChatML's nor Llama 3's
    tokens, and for a chat template that writes turns in another way or with other ids.
    """

    def __init__(self, path: str):
        from transformers import AutoTokenizer

        folder = resolve(path)
        file = os.path.join(folder, "tokenizer.json")
        if not os.path.isfile(file):
            raise ValueError(f"{path}: no tokenizer.json; expected a checkpoint with its tokenizer")
        for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
            part = os.path.join(folder, name)
            if os.path.isfile(part):
                read_json(part)  # names the file if it is no JSON object; the error below could not
        # Loaded by transformers, so that ids are those of transformers and vLLM: for Qwen2 it sets how text is split
        # into words itself, whatever tokenizer.json says.
        try:
            reference = AutoTokenizer.from_pretrained(folder)
        except Exception as error:  # tokenizers has no error classes of its own
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(
                f"{folder}: transformers refuses tokenizer.json, tokenizer_config.json or config.json ({reason})"
            ) from error
        raw = json.loads(reference.backend_tokenizer.to_str())
        # Settings of the last call of transformers before the folder was saved. They would cut or pad every text.
        raw |= {"truncation": None, "padding": None}
        self.control: dict[str, int] = {token["content"]: token["id"] for token in raw["added_tokens"]}
        self.format = _turn_format(self.control, path)
        self.tokenizer = Tokenizer.from_str(json.dumps(raw))
        self.plain = _plain_tokenizer(raw, self.control, path)
        self.text_ids = set(self.plain.get_vocab().values())
        self.turn_start = self.control[self.format.start]
        self.turn_end = self.control[self.format.end]
        self.after_turn = self.encode(self.format.after_turn)
        self.stop_ids = stop_ids(folder, self.control)
        additions = _read_template(reference, self.format, path)
        self.system = additions.system
        self._before = self._template_ids(additions.before)
        self._preamble = additions.preamble
        self.header = [*self._open_turn("assistant", ""), *self._template_ids(additions.no_think_suffix)]
        if self.messages(TALK) != self._template_ids(additions.talk):
            raise ValueError(f"{path}: its tokenizer gives a text other ids alone than within its chat template")

    def encode(self, text: str) -> list[int]:
        """Ids of a text. No text gives a control id."""
        return self.plain.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        """Text of ids, with control tokens as text. Ids in the padding of a vocabulary have none."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=False)

    def turn(self, role: str, content: str, before: str = "") -> list[int]:
        """Ids of a whole turn. before: the template's own text in front of the content."""
        if self.format.strips:
            content = content.strip()
        return [*self._open_turn(role, before + content), self.turn_end, *self.after_turn]

    def messages(self, messages: list[dict]) -> list[int]:
        """Ids of [{"role", "content"}, ...] and the assistant's header.

        Starts with the template's system message if the first message is not a system message. Raises ValueError for
        an empty list, an unknown role and content that is not text.
        """
        if not messages:
            raise ValueError(
                "messages[0]: expected a message of the user (or the system's) before the assistant's first; "
                "what comes before it is an empty list"
            )
        for n, message in enumerate(messages):
            if not isinstance(message, dict):
                raise ValueError(f"messages[{n}]: expected an object with role and content, got {message!r}")
            role = message.get("role")
            content = message.get("content")
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
        for message in messages:
            ids += self.turn(message["role"], message["content"])
        return ids + self.header

    def _open_turn(self, role: str, content: str) -> list[int]:
        """A turn up to the end of its content.

        Text between two control tokens is encoded in one piece, as in the template: a line break at the beginning of
        the content may merge with the format's.
        """
        if not self.format.role_end:
            return [self.turn_start, *self.encode(role + self.format.gap + content)]
        role_end = self.control[self.format.role_end]
        return [self.turn_start, *self.encode(role), role_end, *self.encode(self.format.gap + content)]

    def _template_ids(self, text: str) -> list[int]:
        """Ids of a template's own text, which may hold control tokens."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids


def _turn_format(control: dict[str, int], path: str) -> TurnFormat:
    for turn_format in TURN_FORMATS:
        tokens = {turn_format.start, turn_format.role_end, turn_format.end} - {""}
        if tokens <= set(control):
            return turn_format
    expected = " nor ".join(f"{f.start} and {f.end} ({f.name})" for f in TURN_FORMATS)
    raise ValueError(f"{path}: the tokenizer has neither {expected}")


def _plain_tokenizer(raw: dict, control: dict[str, int], path: str) -> Tokenizer:
    """A tokenizer whose added tokens never match, not even as words of its vocabulary."""
    vocab = {token: i for token, i in raw["model"]["vocab"].items() if token not in control}
    model = {**raw["model"], "vocab": vocab}
    plain = Tokenizer.from_str(json.dumps({**raw, "added_tokens": [], "post_processor": None, "model": model}))
    for token in control:
        if set(plain.encode(f"a{token} {token}").ids) & set(control.values()):
            raise ValueError(f"{path}: the tokenizer makes a control token of the text {token!r}")
    return plain


@dataclass(frozen=True)
class TemplateAdditions:
    """The text that a checkpoint's chat template adds to a conversation."""

    talk: str  # the template's text of TALK
    before: str = ""  # before the first turn: a token that begins every text, if any
    system: str | None = None  # the system message where none is given
    preamble: str = ""  # in a system turn, before the message that was given
    no_think_suffix: str = ""  # after the header of a response that must not reason first


def _read_template(reference: "PreTrainedTokenizerBase", turn_format: TurnFormat, path: str) -> TemplateAdditions:
    """Finds out what the checkpoint's chat template adds by rendering conversations with it.

    Raises ValueError if there is none, or it writes turns in another format.
    """
    if reference.chat_template is None:
        raise ValueError(f"{path}: no chat template; expected one, such as its family's Instruct models have")

    def render(messages: list[dict], **settings: Any) -> str:
        settings = {**TEMPLATE_DEFAULTS, **settings, "tokenize": False, "add_generation_prompt": True}
        try:
            return str(reference.apply_chat_template(messages, **settings))
        except TemplateError as error:
            raise ValueError(f"{path}: its chat template fails on a plain talk: {error}") from error

    def opened(role: str) -> str:
        return f"{turn_format.start}{role}{turn_format.role_end}{turn_format.gap}"

    def turn(role: str, content: str) -> str:
        return f"{opened(role)}{content}{turn_format.end}{turn_format.after_turn}"

    text = render(TALK, enable_thinking=True)
    text_with_system = render([{"role": "system", "content": "S"}, *TALK], enable_thinking=True)
    before = text[: max(0, text.find(turn_format.start))]
    system_turn = re.compile(re.escape(before + opened("system")) + "(.*?)" + re.escape(turn_format.end), re.DOTALL)
    inserted = system_turn.match(text)
    given = system_turn.match(text_with_system)
    preamble = given[1].removesuffix("S") if given else ""
    talk = "".join(turn(**message) for message in TALK) + opened("assistant")
    system = turn("system", inserted[1]) if inserted else ""
    if (text, text_with_system) != (before + system + talk, before + turn("system", f"{preamble}S") + talk):
        raise ValueError(f"{path}: its chat template is not plain {turn_format.name}; a talk gives {text!r}")
    no_think = render(TALK)
    if not no_think.startswith(text):
        raise ValueError(
            f"{path}: with enable_thinking=False its chat template is not plain {turn_format.name}: {no_think!r}"
        )
    return TemplateAdditions(no_think, before, inserted[1] if inserted else None, preamble, no_think[len(text) :])
