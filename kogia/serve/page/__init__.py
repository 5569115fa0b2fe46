"""The web chat at `/`: a page of plain ES modules, and what renders, streams and traces for it."""
