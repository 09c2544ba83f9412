"""What type checkers see of the names that `__init__.py` fetches when they are asked for."""

from hf_steer import aligners as aligners
from hf_steer import analysis as analysis
from hf_steer import config as config
from hf_steer import errors as errors
from hf_steer import evidence as evidence
from hf_steer import io as io
from hf_steer import patching as patching
from hf_steer import provider as provider
from hf_steer import saliency as saliency
from hf_steer import training as training
from hf_steer.compose import compose as compose
from hf_steer.config import AlignerConfig as AlignerConfig
from hf_steer.config import AttentionConfig as AttentionConfig
from hf_steer.config import GateConfig as GateConfig
from hf_steer.config import SaliencyConfig as SaliencyConfig
from hf_steer.config import SteerConfig as SteerConfig
from hf_steer.errors import AlignerError as AlignerError
from hf_steer.errors import ConfigError as ConfigError
from hf_steer.errors import FileError as FileError
from hf_steer.errors import GroundError as GroundError
from hf_steer.errors import PatchError as PatchError
from hf_steer.errors import SaliencyError as SaliencyError
from hf_steer.errors import SteerError as SteerError
from hf_steer.io import from_pretrained as from_pretrained
from hf_steer.io import load_steering as load_steering
from hf_steer.io import save_steering as save_steering
from hf_steer.patching import SteerStatus as SteerStatus
from hf_steer.patching import disable_steering as disable_steering
from hf_steer.patching import get_steer_status as get_steer_status
from hf_steer.patching import patch_model as patch_model
from hf_steer.patching import print_trainable_parameters as print_trainable_parameters
from hf_steer.patching import read_saliency as read_saliency
from hf_steer.patching import trace_steering as trace_steering
from hf_steer.patching import unpatch_model as unpatch_model
from hf_steer.patching import use_saliency as use_saliency
from hf_steer.patching import use_strength as use_strength
from hf_steer.provider import SaliencyProvider as SaliencyProvider
from hf_steer.saliency import Saliency as Saliency

__version__: str
