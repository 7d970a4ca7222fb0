from .files import one_writer as one_writer
