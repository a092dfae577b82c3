"""A name becomes a frozen, quantised Llama with LoRA layers."""
