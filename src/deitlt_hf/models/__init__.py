"""The models, one package each. The two files of a package are saved together with the weights."""
