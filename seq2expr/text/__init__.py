"""What is written about a gene, as a prompt: tables, masks, templates."""
