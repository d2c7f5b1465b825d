"""Where models lie on disk: GGUF files, Hugging Face folders, APRT dump folders."""
