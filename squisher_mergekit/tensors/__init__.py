"""Files of tensors: safetensors, dtypes, streaming writer, atomic output, the Hub, lazy and sharded tensors, top-k."""
