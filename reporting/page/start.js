"use strict";
// Builds the frame of the page and shows what its address says.

document.getElementById("app").append(
  h("header", { id: "header" }), h("div", { id: "filters", class: "filters" }), h("main", { id: "main" }), h("dialog", { id: "help" }));
readAddress();
render();
document.addEventListener("keydown", onKey);
window.addEventListener("popstate", () => { readAddress(); render(); });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redrawCharts);
window.addEventListener("beforeprint", () => fitCharts(300)); // two beside one another on a sheet
window.addEventListener("afterprint", () => fitCharts());
matchMedia("print").addEventListener("change", redrawCharts); // in the colours of paper
