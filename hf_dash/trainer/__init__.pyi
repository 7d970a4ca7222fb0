from .accuracy_stop import TrainAccuracyStop as TrainAccuracyStop
from .arguments import DataTrainingArguments as DataTrainingArguments
from .arguments import ModelArguments as ModelArguments
from .arguments import RoundTrainingArguments as RoundTrainingArguments
from .arguments import StartArguments as StartArguments
from .callback import DashCallback as DashCallback
from .round_trainer import RoundTrainer as RoundTrainer
