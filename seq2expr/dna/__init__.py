"""DNA side: genome, genes, tracks and the windows cut from them."""
