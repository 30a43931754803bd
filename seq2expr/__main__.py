"""``python -m seq2expr``, and so ``torchrun -m seq2expr``."""

from seq2expr.cli import main

main()
