"""The modelling files that go into converted checkpoints. Each is complete together with uptrain_shared.py."""

# uptrain registers these classes once transformers is imported. Were one file to import it first, that file would be
# half made when it is registered.
import transformers as _transformers  # noqa: F401
