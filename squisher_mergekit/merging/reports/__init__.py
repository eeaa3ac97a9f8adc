"""Reports of a merge: text for the terminal and the model card, heat maps, a page for the browser."""
