from .files import one_writer as one_writer
from .logging import show_info as show_info
