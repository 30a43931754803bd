"""What is read of tissue: slides, spots, patches, labels, panels."""
