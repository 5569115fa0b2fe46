// Before anything is drawn, so that no page flashes in the other colours.
document.documentElement.dataset.theme = localStorage.getItem("kogia-theme") || "auto";
