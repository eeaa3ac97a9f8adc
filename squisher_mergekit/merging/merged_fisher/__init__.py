"""Fisher of a merged model, written beside it."""
