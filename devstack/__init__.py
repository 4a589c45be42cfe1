"""The embedded stack: every server Tidegate needs, started, watched and stopped on one machine.

`stack.py` is what the rest uses; `interface.py` says what a piece is, and each piece has a file of its own. Existing
engines only: nothing here is a server of our making but the folder of artifacts over HTTP.
"""
