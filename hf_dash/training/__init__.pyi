from .config import TrainingConfig as TrainingConfig
from .evaluation import ClassAccuracy as ClassAccuracy
from .evaluation import evaluate_model as evaluate_model
from .evaluation import predict as predict
from .loop import TrainingResult as TrainingResult
from .loop import train_round as train_round
from .memorization import ExampleSets as ExampleSets
from .memorization import measure_memorization as measure_memorization
