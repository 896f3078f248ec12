# What R's mclust says of real data: printed as JSON, to be kept as tests/density/fixtures/mclust.json.
#
# Every EM starts from a given classification (mclust's own agglomeration, cut at k groups), so that another program can
# start from the same one. EM runs to a log likelihood that moves by less than 1e-12 in relative terms.
#
# Rscript benchmarks/density/mclust_reference.R > tests/density/fixtures/mclust.json

suppressPackageStartupMessages(library(mclust))
options(digits = 17)

data(wreath); data(banknote); data(diabetes); data(thyroid); data(acidity)
tables <- list(
  faithful = as.matrix(faithful),
  iris = as.matrix(iris[, 1:4]),
  wreath = as.matrix(wreath)[seq(1, 1000, by = 4), ],
  banknote = as.matrix(banknote[, -1]),
  diabetes = as.matrix(diabetes[, -1]),
  thyroid = as.matrix(thyroid[, -1])
)
families <- mclust.options("emModelNames")
groups <- list(faithful = 1:4, iris = 1:4, wreath = c(1, 4, 9), banknote = 1:4, diabetes = 1:4, thyroid = 1:4)

number <- function(x) ifelse(is.finite(x), formatC(x, digits = 17, format = "g"), "null")
list_of <- function(x) paste0("[", paste(x, collapse = ", "), "]")
matrix_of <- function(x) list_of(apply(x, 1, function(row) list_of(number(row))))
fields <- function(...) {
  given <- list(...)
  paste0("{", paste0('"', names(given), '": ', unlist(given), collapse = ", "), "}")
}
text <- function(x) paste0('"', x, '"')

fit_one <- function(x, family, classification) {
  start <- unmap(classification)
  control <- emControl(tol = c(1e-12, 1e-12), itmax = c(20000, 2000))
  few <- emControl(tol = c(0, 1e-12), itmax = c(5, 2000))
  long <- me(data = x, modelName = family, z = start, control = control, warn = FALSE)
  short <- me(data = x, modelName = family, z = start, control = few, warn = FALSE)
  k <- ncol(start)
  df <- nMclustParams(family, d = ncol(x), G = k)
  loglik <- if (is.null(long$loglik)) NA else long$loglik
  value <- bic(family, loglik = loglik, n = nrow(x), d = ncol(x), G = k)
  fields(family = text(family), k = k, df = df, loglik = number(loglik), bic = number(value),
         loglik_5 = number(if (is.null(short$loglik)) NA else short$loglik),
         iterations = number(as.numeric(attr(long, "info"))[1]),
         parameters = if (family %in% c("EVE", "VVE")) parameters_of(long) else "null")
}

# Common orientations have several optima: there the parameters are kept too, to look at the same one.
parameters_of <- function(fit) {
  sigma <- fit$parameters$variance$sigma
  fields(weights = list_of(number(fit$parameters$pro)), means = matrix_of(t(fit$parameters$mean)),
         covariances = list_of(vapply(seq_len(dim(sigma)[3]), function(k) matrix_of(as.matrix(sigma[, , k])), "")))
}

one_table <- function(name) {
  x <- tables[[name]]
  tree <- hc(x, modelName = "VVV", use = "SVD")
  ks <- groups[[name]]
  classes <- lapply(ks, function(k) if (k == 1) rep(1, nrow(x)) else as.vector(hclass(tree, k)))
  fits <- unlist(lapply(seq_along(ks), function(i)
    vapply(families, function(family) fit_one(x, family, classes[[i]]), "")))
  chosen <- Mclust(x, G = ks, verbose = FALSE)
  fields(
    data = matrix_of(x),
    classes = fields_of(paste0(ks), vapply(classes, function(one) list_of(one - 1), "")),
    fits = list_of(fits),
    chosen = fields(family = text(chosen$modelName), k = chosen$G, loglik = number(chosen$loglik),
                    bic = number(chosen$bic), icl = number(chosen$icl), df = chosen$df)
  )
}
fields_of <- function(names, values) paste0("{", paste0('"', names, '": ', values, collapse = ", "), "}")

noise_fit <- function() {
  set.seed(1)
  x <- rbind(as.matrix(faithful), cbind(runif(30, 1, 6), runif(30, 30, 110)))
  noisy <- c(rep(FALSE, 272), rep(TRUE, 30))
  volume <- hypvol(x)
  z <- cbind(unmap(ifelse(x[, 1] > 3.2, 2, 1)) * !noisy, as.numeric(noisy))
  fit <- me(data = x, modelName = "VVV", z = z, Vinv = 1 / volume, control = emControl(tol = c(1e-12, 1e-12)))
  fields(data = matrix_of(x), start = matrix_of(z), log_volume = number(log(volume)), loglik = number(fit$loglik),
         weights = list_of(number(fit$parameters$pro)), means = matrix_of(t(fit$parameters$mean)),
         df = nMclustParams("VVV", d = 2, G = 2, noise = TRUE))
}

prior_fit <- function() {
  x <- as.matrix(iris[, 1:4])
  start <- unmap(as.integer(iris$Species))
  prior <- priorControl()
  fit <- me(data = x, modelName = "VVV", z = start, prior = prior, control = emControl(tol = c(1e-12, 1e-12)))
  used <- defaultPrior(x, G = 3, modelName = "VVV")
  fields(classes = list_of(as.integer(iris$Species) - 1), loglik = number(fit$loglik),
         shrinkage = number(used$shrinkage), dof = number(used$dof), mean = list_of(number(used$mean)),
         scale = matrix_of(used$scale), means = matrix_of(t(fit$parameters$mean)),
         covariance_1 = matrix_of(fit$parameters$variance$sigma[, , 1]))
}

cat(fields(
  mclust = text(as.character(packageVersion("mclust"))),
  R = text(as.character(getRversion())),
  tables = fields_of(names(tables), vapply(names(tables), one_table, "")),
  noise = noise_fit(),
  prior = prior_fit()
), "\n")
