"""Model files on a disk: which files belong to a model, their manifest, the Hugging Face cache."""
