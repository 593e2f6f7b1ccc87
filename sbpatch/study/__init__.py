"""Studies beside the way to a patched model: methods compared, single calls timed, the attention of a model described."""
