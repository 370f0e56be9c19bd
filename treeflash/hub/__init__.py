"""Where models come from: hub ids, local folders, the default pair, GGUF files."""
