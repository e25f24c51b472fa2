"""Images and tags in: folders, tag files and their checks, the built-in scenes; augmentation; maps on disk."""
