"""The commands of `deitlt`, a module each; the scripts call the same."""
