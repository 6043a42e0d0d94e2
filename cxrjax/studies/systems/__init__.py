"""What each reproduced system adds to a study of its arms: one function `add(study) -> Extra` a file."""
