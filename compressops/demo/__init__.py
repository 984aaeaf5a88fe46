"""The main job end to end: compress CifarNet, save it as one file, run it in a new process."""
