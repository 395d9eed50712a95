"""What runs in the clinic: DICOM in, report out."""
