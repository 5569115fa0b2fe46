"""`kogia bench --url URL`: how a server answers under a load, whoever wrote it. Nothing here imports torch."""
