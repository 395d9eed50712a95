"""Pure array functions: numpy and OpenCV in, arrays out."""
