"""The classical peer on the same rows: TF-IDF of words and word pairs with logistic regression."""

from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

CANDIDATE_C = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)  # inverse strength of the L2 penalty


def tfidf_predictions(
    train_texts: list[str],
    train_labels: list[str],
    validation_texts: list[str],
    validation_labels: list[str],
    test_texts: list[str],
) -> list[str]:
    """Predicted labels of `test_texts`.

    Vocabulary and weights come from the training rows; C is the candidate with the best accuracy on the validation
    rows, the stronger penalty at a tie. Test rows play no part in either. Raises ValueError (scikit-learn's) if the
    training rows have fewer than two classes.
    """
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    train = vectorizer.fit_transform(train_texts)
    validation = vectorizer.transform(validation_texts)
    best, best_accuracy = None, -1.0
    for c in CANDIDATE_C:
        model = LogisticRegression(C=c, max_iter=1000).fit(train, train_labels)
        validation_accuracy = model.score(validation, validation_labels)
        if validation_accuracy > best_accuracy:
            best, best_accuracy = model, validation_accuracy
    return [str(label) for label in best.predict(vectorizer.transform(test_texts))]
