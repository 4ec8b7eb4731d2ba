"""llama.cpp's server as an engine: found, started, asked and tuned."""
