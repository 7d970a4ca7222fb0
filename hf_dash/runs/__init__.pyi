from .comparison import Comparison as Comparison
from .comparison import PairedAccuracy as PairedAccuracy
from .comparison import Verdict as Verdict
from .comparison import compare_models as compare_models
from .comparison import decide as decide
from .continual import run_rounds as run_rounds
from .promotion import promote as promote
from .promotion import rollback as rollback
