"""k-MTR: learning to read the heart straight from undersampled MRI k-space."""
