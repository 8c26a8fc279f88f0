"""The files frodctl defines or shares with PEFT: the shared-basis file."""
