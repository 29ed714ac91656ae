"""`tubelet plan`: what a run would need on a cluster that nobody has to own yet. Arithmetic; no GPU, no process group."""
