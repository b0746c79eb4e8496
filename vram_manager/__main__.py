"""`python -m vram_manager` is the same as `vram-manager`."""

from vram_manager.cli import main

if __name__ == "__main__":
    main()
