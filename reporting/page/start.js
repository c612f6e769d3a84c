"use strict";
// Builds the frame of the page and shows the view in its address.

document.getElementById("app").append(
  h("header", { id: "header" }), h("div", { id: "filters", class: "filters" }), h("main", { id: "main" }), h("dialog", { id: "help" }));
readAddress();
render();
document.addEventListener("keydown", onKey);
window.addEventListener("popstate", () => { readAddress(); render(); });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redrawCharts);
window.addEventListener("beforeprint", () => fitCharts(300)); // two in a row on paper
window.addEventListener("afterprint", () => fitCharts());
matchMedia("print").addEventListener("change", redrawCharts); // with the colours for paper
