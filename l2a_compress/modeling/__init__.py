"""Gates inside Hugging Face causal language models: wrapping, allocating, generating."""
