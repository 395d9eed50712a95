"""The light networks of the field, one file each, on the tasks of the shipped families; see `models/shelf/design.py`."""
