"""vLLM: its servers started with each setting, asked, and ended."""
