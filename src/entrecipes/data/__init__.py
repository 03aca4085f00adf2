"""Image data: sources, preparation, and a loader that can start at any image. Importing this package costs nothing."""
