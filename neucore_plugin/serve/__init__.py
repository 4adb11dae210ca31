"""`neucore serve`: an index behind HTTP, and a page to search it with. Takes any model with the index's protocol.

app.py (the addresses), forms.py (what a request may say), guard.py (who may ask, and how much), pictures.py (decoding,
thumbnails), worker.py (the one thread that owns the model), feedback.py (votes become triplets), running.py (the
process), page/ (HTML, script and style of the page).
"""
