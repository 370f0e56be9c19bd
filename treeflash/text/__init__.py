"""Text in and out: tokenizer, chat templates, prompts, streaming and stop strings."""
