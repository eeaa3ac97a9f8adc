"""Files of tensors: safetensors, a streaming writer, atomic output, the Hub, lazy and sharded tensors, exact top-k."""
