"""A name becomes a frozen, quantised decoder with LoRA layers."""
