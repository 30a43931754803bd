"""Network parts that every system shares: batch, system, heads, losses, backbones."""
