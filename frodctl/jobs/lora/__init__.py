"""An adapter's or a fine-tune's change of a model, written as an ordinary LoRA adapter."""
