"""Tags as annotation tools and other projects write them. `read_any` finds out which form it is."""

from tag2mask.data.tag_formats.converting import read_converted
from tag2mask.data.tag_formats.image_names import name_tags
from tag2mask.data.tag_formats.reading import read_any
from tag2mask.data.tag_formats.spelling import spellings
from tag2mask.data.tag_formats.writing import Form, write_tags

__all__ = ["Form", "name_tags", "read_any", "read_converted", "spellings", "write_tags"]
