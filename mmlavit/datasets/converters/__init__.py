"""Public data sets, from the files of their download to what the toolboxes read.

``tools/dataset_converters`` has a command for each. A converter's ``plan`` looks at a download and
says which files to write; ``conversion.write`` writes them. ``import mmlavit`` loads none of this.
"""
