from .accuracy_stop import TrainAccuracyStop as TrainAccuracyStop
from .arguments import DataTrainingArguments as DataTrainingArguments
from .arguments import ModelArguments as ModelArguments
from .arguments import StartArguments as StartArguments
from .callback import DashCallback as DashCallback
