"""The demo: a small model that this project trained, and the main job run on it."""
